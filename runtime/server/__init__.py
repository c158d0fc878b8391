"""HTTP server: OpenAI's image API, health checks, metrics and a page, in front of a worker or a cluster.

``run.serve`` runs a server, ``app.create_app`` has the routes, ``service.ImageService`` is what the routes call.
Needs the extra ``serve``.
"""
