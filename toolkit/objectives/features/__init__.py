"""Objectives on features: of one image, between images, or of the student's stages."""
