"""Train, export and measure a tiny SD3 pipeline on captioned shapes."""
