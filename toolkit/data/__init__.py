"""Images: where they lie, how they are decoded, listed, labelled and cut into views."""
