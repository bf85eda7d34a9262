"""kohya's dialect: names without dots, and an alpha for every module."""
