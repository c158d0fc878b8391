"""``offcut bench serve``: closed and open loops, overload and soak of the server, and two other ways to batch."""
