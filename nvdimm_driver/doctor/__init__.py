"""What ``nvdimmctl doctor`` looks at, by theme. Nothing is changed on the host."""
