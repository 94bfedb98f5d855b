"""What rotation.py reports: laws of rotated vectors, errors of quantizers, the moment check."""
