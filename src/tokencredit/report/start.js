for (const data of document.querySelectorAll("script[data-draw]")) {
  drawers[data.dataset.draw](data.parentElement, JSON.parse(data.textContent));
}
