"""An adapter in memory as it is served: read, checked, scaled, or materialised. Imports `fit` and below."""
