from refmerge.method import same_as
from refmerge.methods.averaging.linear import linear

uniform_soup = same_as(linear, "official:uniform_soup", source="mlfoundations/model-soups@d5398f1 main.py")
