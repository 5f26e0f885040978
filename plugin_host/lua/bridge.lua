-- What the action "Backline: bridge" runs inside Ardour: the one command that waits in Backline's folder, if any.
-- An action that raises is removed by Ardour, so nothing may escape. MAILBOX is filled in by `backline ardour install`.
local running = MAILBOX .. "/running.lua"
if os.rename(MAILBOX .. "/command.lua", running) then -- a trigger that comes twice finds nothing the second time
   local command = loadfile(running)
   if command then pcall(command) end
end
