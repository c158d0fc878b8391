"""Training of the shapes model, its ControlNet and the judge network; not in the wheel."""
