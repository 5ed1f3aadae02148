"""ES-DDPM: diffusion models, early stop, and the engine that samples from them.

from guided_diffusion import early_stop, load_network
"""

__all__ = ["early_stop", "load_network"]


def __getattr__(name: str) -> object:
    # Torch is loaded when one of them is asked for: command lines that need none import this too.
    if name in __all__:
        from guided_diffusion import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
