"""One YAML page per dataset."""
