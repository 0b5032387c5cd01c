"""ProxProp: Frerix, Moellenhoff, Moeller, Cremers, Proximal Backpropagation."""
