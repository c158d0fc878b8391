"""Subclasses that override one method of an object's class and keep the class's name."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def override_method(cls: type, mixin: type, method: str, override: str) -> type:
    """Return a subclass of ``cls`` whose ``method`` calls the mixin's method ``override``.

    The subclass has the name of ``cls``, which diffusers saves and looks up. An object is given the subclass through
    its ``__class__``, because Python looks up ``__call__`` in the class and not in the object. A class that has the
    mixin already is returned as it is.
    """
    if issubclass(cls, mixin):
        return cls

    @functools.wraps(getattr(cls, method))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, override)(*args, **kwargs)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (mixin, cls), {**names, method: call})
