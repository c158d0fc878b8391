"""The server on several devices and machines: Ray Serve runs one replica per device behind one ingress.

The ingress is the application of ``server.app`` around an ``ingress.ClusterService``, which checks keys, limits, queue
and deadlines. Each replica is a ``server.service.WorkerService``, the same class that ``offcut serve`` uses
without Ray.
``deploy.deploy`` deploys a plan. Needs the extra ``ray``.
"""
