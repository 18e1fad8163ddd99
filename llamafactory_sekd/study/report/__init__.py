"""The study's report: tables and plots in the paper's form, and what the paper does not show."""
