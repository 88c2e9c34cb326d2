"""placeholder"""
LAWS: dict = {}
