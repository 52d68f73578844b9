"""Results in the forms that people and other tools open. Promise: equal results give equal bytes."""
