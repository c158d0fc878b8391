"""A load generator for ``offcut serve``: closed and open loops, overload and soak, compared with two other ways to batch."""
