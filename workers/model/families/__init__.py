"""One function per family: what the keys of its config.json mean. `workers.model.config` has the table of them."""
