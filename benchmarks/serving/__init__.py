"""A load generator for ``offcut serve``: closed and open loops, overload and soak, beside two other ways to batch."""
