"""How good a changed model still is at its task: metrics of a candidate beside its reference, and floors for them.

`tasks` tells what a model is for, one file a task measures, `floors` says what is too little.
"""
