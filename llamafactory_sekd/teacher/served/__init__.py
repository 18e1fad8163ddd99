"""The teacher on another machine: what asks it over HTTP, and the service that `sekd serve` runs."""
