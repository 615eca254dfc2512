"""The tiny world's detector of shapes and reader of glyphs: both work without weights."""
