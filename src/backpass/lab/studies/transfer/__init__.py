"""Images made against some networks, and shown to others."""
