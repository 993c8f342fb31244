"""Registration with torch.library, the quick way: define + impl + fake kernel + one autograd.Function.

Calls go public function -> `torch.ops.fastlm.<op>` -> (autograd) -> the chosen backend. The op is opaque to
torch.compile, which sees its schema and fake kernel alone, so every op traces with fullgraph=True.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastlm", "FRAGMENT")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
) -> Any:
    """Registers `fastlm::<schema>` and returns its callable overload.

    `implementation` serves every device (it asks the registry for a backend); `fake` returns empty outputs of the right
    shape, dtype and strides; `autograd.apply` takes the op's positional arguments and in its forward calls the
    overload again, which then runs below autograd because gradients are off there. An op without `autograd` is a
    backward op: differentiating through it raises.
    """
    LIBRARY.define(schema)
    name = schema.split("(", 1)[0]
    overload = getattr(torch.ops.fastlm, name).default
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        function = autograd.apply

        def differentiate(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                return function(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        LIBRARY.impl(name, differentiate, "Autograd")
    return overload
