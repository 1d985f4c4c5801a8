"""The CLIP teacher: its features of every view, kept in a store, and the classifier made of class names."""
