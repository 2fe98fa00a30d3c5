"""Training through time as Lightning modules, callbacks and plugins."""
