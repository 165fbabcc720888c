"""Trackers follow a run and show it elsewhere, such as in a dashboard. One file per tracker."""
