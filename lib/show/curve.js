// The page's side of lib.show.sliders.Curve: a canvas on which a curve is drawn from left to right.
function render({ model, el }) {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  const [width, height, edge] = [792, 110, 8];
  canvas.width = width;
  canvas.height = height;
  canvas.style = "border:1px solid #7A7A7A;cursor:crosshair;touch-action:none;max-width:100%";
  canvas.setAttribute("aria-label", "Draw a curve here, with the mouse or a finger");
  el.append(canvas);
  let value = [...model.get("value")], last = null;

  const draw = () => {
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.strokeStyle = "#0072B2";
    pen.lineWidth = 2;
    pen.beginPath();
    value.forEach((y, i) => pen.lineTo((i + 0.5) / value.length * width, height / 2 - y * (height / 2 - edge)));
    pen.stroke();
  };
  const move = (event) => {
    const box = canvas.getBoundingClientRect();
    const inside = (part, count) => Math.max(0, Math.min(count - 1, Math.floor(part * count)));
    const place = inside((event.clientX - box.left) / box.width, value.length);
    const across = ((event.clientY - box.top) / box.height * height - height / 2) / (height / 2 - edge);
    const y = Math.max(-1, Math.min(1, -across));
    const from = last ?? { place, y };
    const steps = Math.max(1, Math.abs(place - from.place));
    for (let k = 0; k <= steps; k++) {  // the mouse may have passed over places between two events
      value[Math.round(from.place + (place - from.place) * k / steps)] = from.y + (y - from.y) * k / steps;
    }
    last = { place, y };
    draw();
  };
  const send = () => {
    last = null;
    model.set("value", [...value]);
    model.save_changes();
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    move(event);
  };
  canvas.onpointermove = (event) => event.buttons && move(event);
  canvas.onpointerup = send;
  canvas.onpointercancel = send;
  model.on("change:value", () => {
    value = [...model.get("value")];
    draw();
  });
  draw();
}
export default { render };
