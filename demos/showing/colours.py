"""Okabe and Ito's colours, which colour-blind readers can tell apart, and greys for what the eye may pass over."""

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
BLACK, DARK, GREY = "#000000", "#777777", "#999999"
