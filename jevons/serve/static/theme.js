// Runs before the first paint, so that a chosen theme does not flash. The pages' modules do the rest.
(() => {
  try {
    const theme = localStorage.getItem("jevons.theme");
    if (theme) document.documentElement.dataset.theme = theme;
  } catch { /* storage is off: the system's theme holds */ }
})();
