"""The embedded model: moving-shapes scenes with exact masks, and a stock CogVideoX pipeline trained on them."""
