"""The compute driver for Nova. Nothing else of the driver imports this, and only this imports Nova."""
