"""A load test of ``offcut serve``: closed and open loops, overload, soak, and two other ways to batch."""
