"""OCR: the reward, and the engine that reads real images."""
