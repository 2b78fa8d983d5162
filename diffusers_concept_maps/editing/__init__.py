"""Attention that is written to while a video is generated: `edit_attention`."""
