"""Checks of every node before the first step: is it fit to take part, and do all of them fit together?"""
