"""`fastssl report`: one HTML page about one or several runs, from what their folders hold."""
