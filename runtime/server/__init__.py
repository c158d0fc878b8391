"""An HTTP server in front of a worker: OpenAI's image API, health, metrics and a page to try it.

``run.serve`` is the way in; ``app.create_app`` the routes; ``service.Service`` what they share. Needs the extra
``serve``.
"""
