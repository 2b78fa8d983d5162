"""Correspondence between frames: matching, point tracking and guidance (DiffTrack, arXiv 2506.17220)."""
