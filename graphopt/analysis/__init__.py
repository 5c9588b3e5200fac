"""Facts about a graph, found by dataflow. Reads, never writes."""
