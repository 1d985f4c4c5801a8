"""The bundle: the folder that travels to the device."""
