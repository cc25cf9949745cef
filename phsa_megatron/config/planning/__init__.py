"""`phsa-train plan`: memory, communication and time of layouts, and the best of them. Needs no torch."""
