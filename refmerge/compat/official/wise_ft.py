from refmerge.method import same_as
from refmerge.methods.averaging.wise_ft import wise_ft as ours

wise_ft = same_as(ours, "official:wise_ft", source="mlfoundations/wise-ft@58b7a4b src/wise_ft.py:_merge", alpha="alpha")
