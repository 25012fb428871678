"""Where Segment and Window were; they are what the ops stand on, too, and live in worldkv_kernels.window."""

from ..window import Segment, Window

__all__ = ["Segment", "Window"]
