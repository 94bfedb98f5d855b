"""What an exchange will take, predicted from what was measured; `python -m rhtcomm plan`."""
