"""The main job of xdpmond, shown on real packets."""
