"""All tests, in the parent and in the pool's workers, get Megatron's CPU backend before they import Megatron."""

import megatron_sage.parallel  # noqa: F401
