"""What things are called on the cluster."""

APP = "offcut"
"""The application; an update has the same name."""

INGRESS, REPLICA = "Ingress", "Replica"
"""Its deployments."""
