"""For lectures: the first step told slowly (explain), and what LfU's relatives cost (relatives)."""
