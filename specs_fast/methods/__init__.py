"""Each method of the papers, composed of stages."""
