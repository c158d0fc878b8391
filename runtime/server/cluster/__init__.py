"""The server on more devices and machines: Ray Serve runs one replica a device, and one ingress in front of them.

The ingress is the application of ``server.app`` around a ``front.Front``: key, limits, queue and deadlines are its
own. Each replica is a ``server.service.Service``, as ``offcut serve`` has one. ``deploy`` is the way in. Needs the
extra ``ray``.
"""
